"""Model cards: valid Hub metadata, a title, lines that load and use the model, and what else there is to say."""

from huggingface_hub import ModelCardData

RQVAE_USAGE = """from rq_hf import RQVAEModel

vae = RQVAEModel.from_pretrained(...)
codes = vae.get_codes(pixels)  # (B, 3, height, width) in [-1, 1] -> (B, H, W, D)
pixels = vae.decode_codes(codes).sample"""
PIPELINE_USAGE = """from rq_hf import RQPipeline

pipe = RQPipeline.from_pretrained(...)
{call}"""
CARD = """---
{metadata}
---

# {title}

{introduction}```python
{usage}
```
{details}"""


def model_card(title: str, usage: str, *, introduction: str = "", details: str = "", **metadata) -> str:
    """
    The text of a `README.md`.

    Args:
        usage: Python code that loads and uses the model.
        introduction: Markdown above the code.
        details: Markdown below the code.
        metadata: fields of [`~huggingface_hub.ModelCardData`], such as `pipeline_tag`, `tags` and `license`.
    """
    return CARD.format(
        metadata=ModelCardData(library_name="rq_hf", **metadata).to_yaml(),
        title=title,
        introduction=f"{introduction}\n\n" if introduction else "",
        usage=usage,
        details=f"\n{details}\n" if details else "",
    )
