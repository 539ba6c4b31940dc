"""Model folder → tensors: names, formats, conversions, the module tree, kt_kernel's files."""
