"""Programs that drive a stack by its address alone, on a laptop or a cluster: python -m scripts.drivers.NAME --help."""
