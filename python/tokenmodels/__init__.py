"""Token-reduction methods assembled from the functions of `tokenkernels`; each reads like its paper."""
