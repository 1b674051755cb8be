"""Tables for the terminal and pictures: needs the ``viz`` extra."""
