"""Looking at the machine, at what a configuration will cost on it, and telling results."""
