"""MagiAttention inside other libraries. Each submodule needs the library that it is named after."""
