"""Looking at the machine and at what a configuration will cost on it."""
