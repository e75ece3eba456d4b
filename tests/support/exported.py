"""Sampling from what `export_onnx` writes, with onnxruntime."""

import json
from pathlib import Path

import numpy as np
import torch


class Exported:
    """The graphs in a folder, and the loops around them."""

    def __init__(self, folder: Path):
        import onnxruntime

        self.about = json.loads((folder / "onnx.json").read_text(encoding="utf-8"))
        self.sessions = {file.stem: onnxruntime.InferenceSession(file) for file in folder.glob("*.onnx")}

    def run(self, name: str, **inputs) -> list[torch.Tensor]:
        outputs = self.sessions[name].run(None, {key: np.asarray(value) for key, value in inputs.items()})
        return [torch.from_numpy(output) for output in outputs]

    def greedy(
        self, cond_ids: torch.Tensor, scale: float | None = None, prefix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Greedy codes `(B, H, W, D)` of conditions `(B, L)`, or with guidance `(2·B, L)` with a null half; after the
        codes `(B, t, D)` of the first positions."""
        height, width, depth = self.about["code_shape"]
        cache, times = self.about["cache"], 1 if scale is None else 2
        batch_size = len(cond_ids) // times
        codes = torch.zeros(batch_size, 0, depth, dtype=torch.long) if prefix is None else prefix
        past = torch.zeros(cache["layers"], 2, len(cond_ids), cache["heads"], 0, cache["dim"])
        new = codes
        for _ in range(codes.shape[1], height * width):
            context, past = self.run("spatial_step", cond_ids=cond_ids, codes=new.repeat(times, 1, 1), past=past)
            chosen = torch.zeros(batch_size, 0, dtype=torch.long)
            for _ in range(depth):
                (logits,) = self.run("depth_step", context=context, codes=chosen.repeat(times, 1))
                if scale is not None:
                    conditional, null = logits.chunk(2)
                    logits = null + scale * (conditional - null)
                chosen = torch.cat([chosen, logits.argmax(dim=-1, keepdim=True)], dim=1)
            cond_ids, new = cond_ids[:, :0], chosen[:, None]
            codes = torch.cat([codes, new], dim=1)
        return codes.view(batch_size, height, width, depth)

    def decode(self, codes: torch.Tensor, num_positions: int | None = None) -> torch.Tensor:
        """Codes `(B, H, W, D)` -> pixels `(B, 3, height, width)` in [0, 1]."""
        count = codes[0, ..., 0].numel() if num_positions is None else num_positions
        return self.run("decoder", codes=codes, num_positions=count)[0]
