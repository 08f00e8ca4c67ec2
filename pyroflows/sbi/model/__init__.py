"""What is read from a simulator: runs and draws, parameters, observations, densities."""
