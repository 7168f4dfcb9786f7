"""The ground floor of diffuser: files, images, processor kernels, processes, metrics. None of it knows of diffusion."""
