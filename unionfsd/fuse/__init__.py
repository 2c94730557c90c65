"""Everything between the union and the kernel: mounting, the transports, and the driver that runs operations."""
