import copy
import math
import shutil

import numpy as np
import pytest
import torch
from generation import GREEDY, greedy_by_forward, variants
from tiny import STACK, D, K, T, kinds, tiny_codes, tiny_condition, tiny_transformer

from rq_hf import RQTransformerModel


class TestCompiled:
    """Traced by torch.compile without a break; what a device's compiler makes of the graphs is its own affair."""

    OPTIONS = {"backend": "aot_eager", "mode": None}
    SETTINGS = [
        GREEDY,
        {
            "generator": [3, 1, 4],
            "top_k": [9, 2, 12, 1],
            "top_p": [0.3, 1.0, 0.95, np.float32(0.9)],
            "temperature": 1.5,
        },
    ]

    @pytest.fixture(autouse=True)
    def forget_graphs(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    @kinds
    def test_forward_gives_the_same_logits(self, kind):
        model, codes, ids = tiny_transformer(kind), tiny_codes(), tiny_condition(kind)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(codes, ids).logits, model(codes, ids).logits)

    @kinds
    @variants
    def test_steps_draw_the_same_codes_by_two_graphs(self, kind, overrides):
        model, ids = tiny_transformer(kind, **overrides), tiny_condition(kind, 3)
        model.set_attn_implementation("eager" if kind == "class" else "sdpa")
        expected = model.generate(ids, num_images=3, **GREEDY)
        model.compile_steps(**self.OPTIONS)
        for _ in range(2):
            assert torch.equal(model.generate(ids, num_images=3, **GREEDY), expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == (1 if model.config.code_shape[:2] == (1, 1) else 2)

    @pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "drawn"])
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_steps_draw_the_same_codes_with_all_settings(self, settings, scale):
        model, ids, given = tiny_transformer("class"), tiny_condition("class", 3), tiny_codes(3)
        call = {**settings, "guidance_scale": scale, "prefix_codes": given, "start": 2, "keep_depth": 1}
        if scale != 1.0:
            call["guidance_schedule"] = "cosine"
        expected = model.generate(ids, **call)
        model.compile_steps(**self.OPTIONS)
        assert torch.equal(model.generate(ids, **call), expected)

    @kinds
    def test_steps_go_on_from_replaced_codes(self, kind):
        model, ids = tiny_transformer(kind, code_shape=(3, 4, D)), tiny_condition(kind)

        def change_the_first(position, codes):
            codes[:, 0, 0] = (codes[:, 0, 0] + 1) % K
            return codes if position != 5 else None

        call = {"cond_ids": ids, "num_images": 2, "on_position": change_the_first, **GREEDY}
        expected = model.generate(**call)
        model.compile_steps(**self.OPTIONS)
        assert torch.equal(model.generate(**call), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2

    def test_steps_need_no_other_graphs_for_other_temperatures_guidance_and_starts(self):
        model, ids, given = tiny_transformer("class"), tiny_condition("class", 3), tiny_codes(3)
        calls = [{"temperature": 0.5 + i / 10, "guidance_scale": 2.0 + i, "generator": [i, 1, 2]} for i in range(10)]
        calls += [{"prefix_codes": given, "start": start, "guidance_scale": 2.0, **GREEDY} for start in range(1, T)]
        expected = [model.generate(ids, **call) for call in calls]
        model.compile_steps(**self.OPTIONS)
        for call, codes in zip(calls, expected):
            assert torch.equal(model.generate(ids, **call), codes)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # greedily another one

    def test_steps_sample_any_number_of_images_whatever_the_recompile_limit_outside(self):
        model = tiny_transformer()
        expected = [model.generate(num_images=n, **GREEDY) for n in range(1, 5)]
        model.compile_steps(**self.OPTIONS)
        with torch._dynamo.config.patch(recompile_limit=2):
            for n, codes in enumerate(expected, start=1):
                assert torch.equal(model.generate(num_images=n, **GREEDY), codes)

    def test_steps_within_steps(self):
        model = tiny_transformer()
        call = {"num_images": 2, "generator": [1, 2]}

        def draw_others(position, codes):
            model.generate(num_images=2, generator=[3, 4])

        expected = model.generate(**call)
        model.compile_steps(**self.OPTIONS)
        assert torch.equal(model.generate(**call, on_position=draw_others), expected)

    def test_steps_in_inference_mode_first(self):
        model = tiny_transformer()
        expected = model.generate(num_images=2, **GREEDY)
        model.compile_steps(**self.OPTIONS)
        with torch.inference_mode():
            assert torch.equal(model.generate(num_images=2, **GREEDY), expected)
        assert torch.equal(model.generate(num_images=2, **GREEDY), expected)

    def test_steps_forget_logits_that_are_no_numbers(self):
        model = tiny_transformer()
        expected, weight = model.generate(num_images=2, **GREEDY), model.spatial_stack.layers[0].attention_norm.weight
        model.compile_steps(**self.OPTIONS)
        kept = weight.detach().clone()
        torch.nn.init.constant_(weight, math.nan)
        with pytest.raises(ValueError, match="NaN or infinite"):
            model.generate(num_images=2, **GREEDY)
        weight.data.copy_(kept)
        assert torch.equal(model.generate(num_images=2, **GREEDY), expected)

    def test_steps_see_weights_that_were_changed_moved_or_copied(self):
        model, ids = tiny_transformer("class"), tiny_condition("class")
        model.compile_steps(**self.OPTIONS)
        model.generate(ids, **GREEDY)
        copied = copy.deepcopy(model)
        torch.nn.init.normal_(copied.code_projection.weight)
        copied.double()
        assert torch.equal(copied.generate(ids, **GREEDY), greedy_by_forward(copied, ids))

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
    def test_steps_draw_the_same_codes_when_compiled_to_machine_code(self):
        model, ids = tiny_transformer("text"), tiny_condition("text", 3)
        expected = model.generate(ids, **self.SETTINGS[1])
        model.compile_steps()
        assert torch.equal(model.generate(ids, **self.SETTINGS[1]), expected)

    def test_weights_on_disk_are_neither_compiled_nor_packed(self, tmp_path):
        tiny_transformer().save_pretrained(tmp_path)
        third = sum(weight.nbytes for weight in tiny_transformer().parameters()) // 3
        model = RQTransformerModel.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": third}, offload_folder=tmp_path / "offload"
        )
        with pytest.raises(ValueError, match="got weights on disk"):
            model.pack_weights()
        with pytest.raises(ValueError, match=r"cannot compile a model that is spread over \['cpu', 'disk'\]"):
            model.compile_steps()

    def test_refuses_attention_without_masks_and_packed_weights(self):
        model = tiny_transformer()
        model.spatial_stack.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="attn_implementation .* got 'flash_attention_2'"):
            model.compile_steps()
        model.set_attn_implementation("sdpa")
        model.compile_steps()
        with pytest.raises(ValueError, match="cannot pack a model after compile_steps"):
            model.pack_weights()
        packed = tiny_transformer()
        packed.pack_weights()
        with pytest.raises(ValueError, match="cannot compile a packed model"):
            packed.compile_steps()


class TestPackedWeights:
    @kinds
    @pytest.mark.parametrize("shared_classifier", [True, False])
    @pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
    def test_leave_codes_and_logits_as_they_are(self, kind, shared_classifier, activation):
        stack = STACK | {"num_hidden_layers": 2, "hidden_act": activation}
        options = {"spatial_config": stack, "depth_config": stack, "shared_classifier": shared_classifier}
        model, ids, codes = tiny_transformer(kind, **options), tiny_condition(kind), tiny_codes()
        expected, logits = model.generate(ids, num_images=2, **GREEDY), model(codes, ids).logits
        model.pack_weights()
        torch.testing.assert_close(model(codes, ids).logits, logits)
        assert torch.equal(model.generate(ids, num_images=2, **GREEDY), expected)

    @kinds
    def test_are_no_less_exact_in_bfloat16(self, kind):
        model, ids, codes = tiny_transformer(kind), tiny_condition(kind, 16), tiny_codes(16)
        exact = model(codes, ids).logits
        plain = model.bfloat16()(codes, ids).logits.float()
        model.pack_weights()
        packed = model(codes, ids).logits.float()
        assert (packed - exact).norm() < 1.1 * (plain - exact).norm()

    def test_are_saved_as_they_were(self, tmp_path):
        model = tiny_transformer("text")
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.pack_weights()
        model.pack_weights()
        model.save_pretrained(tmp_path)
        loaded = RQTransformerModel.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded.state_dict(), weights, rtol=0, atol=0)

    def test_cannot_be_moved_or_cast(self):
        model = tiny_transformer()
        model.pack_weights()
        model.to("cpu").eval()
        for move in (lambda: model.to("meta"), model.bfloat16):
            with pytest.raises(ValueError, match="packed weights stay on the CPU in torch.float32"):
                move()

    def test_have_no_loss(self):
        model = tiny_transformer()
        model.pack_weights()
        with pytest.raises(ValueError, match="a packed model cannot compute a loss; reload it"):
            model(tiny_codes(), labels=tiny_codes())

    def test_need_float32_or_bfloat16(self):
        with pytest.raises(ValueError, match="in float32 or bfloat16, got a model on cpu in torch.float16"):
            tiny_transformer().half().pack_weights()
