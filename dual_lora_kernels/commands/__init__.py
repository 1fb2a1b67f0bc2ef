"""The subcommands of ``dual-lora``: a file each, whose `add` gives the command line its parser."""
