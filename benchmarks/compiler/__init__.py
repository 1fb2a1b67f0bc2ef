"""What compilers make of the kernels, for chips that are not there: registers, spills, instructions, launches."""
