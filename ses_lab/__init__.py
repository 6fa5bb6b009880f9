"""A workbench for spectral entropy: training, distillation, weight spectra, probes, reports."""
