"""Tables and pictures of the documents, made from the committed results and from nothing else.

A topic is a module of this package with ``TABLES``, from a block's name to the function that writes its Markdown, or
``PICTURES``, from a file's name in ``docs/images`` without its suffix to a ``Picture``, or with both. Whoever adds a
topic adds its module; nothing else has to know of it.
"""
