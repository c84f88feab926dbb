"""Where heads look: masses, distances, maps over the image, contrasts and rollouts."""
