"""Exchange with PyTorch's side of the world, as safetensors files and JSON; nothing is ever pickled or unpickled.

safetensors.py  the file format    names.py   what each parameter is called there    tokenizer.py  tokenizer.json
formats.py      config.json of each form, and back
exporting.py    `linscale export`  importing.py  `linscale import`
torch_model.py  a plain PyTorch model of what transformers has not, copied beside its export
"""
