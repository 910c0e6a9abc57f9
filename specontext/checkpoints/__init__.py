"""What lies in checkpoint directories, read without building anything: files, headers of weights, signs of quantisation.

Nothing here knows a model class; whoever asks names the error that is raised.
"""
