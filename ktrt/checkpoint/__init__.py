"""Reads model folders: tensor names, formats, conversions, the module tree, kt_kernel's files."""
