"""A decode step on packed buffers of fixed size as one compiled loop for the CPU."""
