"""Plans: what a build will make and do, worked out from headers alone."""
