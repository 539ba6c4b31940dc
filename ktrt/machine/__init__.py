"""Facts about the machine: processors, memory, limits of its container."""
