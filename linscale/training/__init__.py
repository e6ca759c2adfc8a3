"""Training: recipes, the loop, the step, the optimizer, checkpoints, metrics.

A run lives in one folder, <output>/<name>/, which is all that later stages know of it:
  config.json     resolved config, parameter counts, FLOPs a token, the data's fingerprint
  metrics.jsonl   one line a logged step (loss, grad_norm, lr, speed) or evaluation (heldout_loss, heldout_bpb), each
                  with step, tokens and flops so far
  checkpoints/    orbax, or safetensors where they are small: parameters, optimizer, and the position in the data
  tensorboard/    the same numbers for TensorBoard
  DONE.json       the last evaluation; exists only when the run is finished
"""
