"""Replace softmax attention by a sliding window with sinks, load the result, and let it write. Run it from the repository's root."""

import effconvert

effconvert.convert("effconvert/demo/model", {"streaming": {"window": 32}}, output="streaming", tokens=1024)
model, tokenizer = effconvert.load("streaming", device="cpu")
prompt = tokenizer("Return the", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=100, do_sample=False)
print(tokenizer.decode(written[0]))
