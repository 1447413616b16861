"""What several test files share: tiny networks, ranks, runs, commands, real and hostile clips."""
