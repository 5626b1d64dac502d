"""What people run around a federation: jobs, kits, the simulator, the console."""
