"""Ray Serve applications: everything that answers over the network."""
