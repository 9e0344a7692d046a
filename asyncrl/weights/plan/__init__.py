"""Which generator gets which policy version, and when: the desk's part of the weight plane. No torch."""
