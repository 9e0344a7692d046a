"""The learner's process that talks: leases, journal, batches, decisions on weights. No torch."""
