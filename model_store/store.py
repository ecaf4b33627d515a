"""The data directory and its parts.

<data_dir>/
  checkpoints/<name>/        an ordinary Hugging Face folder: config.json, tokenizer files, *.safetensors; and checkpoint.json, written last
  variants/<name>/<slug>/    model.safetensors with the quantized layers only, and manifest.json, written last
  uploads/<id>/              parts as they arrive; files/<id>: a completed upload
  precis.sqlite              jobs, uploads, files
  tmp/                       whatever is being written; renamed into place when whole, emptied at start
"""
