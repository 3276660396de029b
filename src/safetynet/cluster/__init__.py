"""From one machine to many: jobs, and sweeps of one recipe over a grid."""
