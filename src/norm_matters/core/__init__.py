"""The parts every room uses: configuration, errors, registries, the clock, seeding."""
