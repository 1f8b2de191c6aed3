"""Token-reduction methods, assembled from `tokenkernels`; each reads like its paper."""
