import pytest
import torch
from tiny import L, tiny_config, tiny_tokenizer

from rq_hf.pipelines.conditions import Conditions, encode_conditions


def test_conditions_are_repeated_in_a_row():
    conditions = Conditions(2, ["a", "b"], torch.tensor([[1], [2]]), torch.tensor([[3], [4]])).repeat(3)
    assert conditions.count == 6
    assert conditions.values == ["a", "a", "a", "b", "b", "b"]
    assert conditions.cond_ids.tolist() == [[1], [1], [1], [2], [2], [2]]
    assert conditions.negative_cond_ids.tolist() == [[3], [3], [3], [4], [4], [4]]


def test_an_unconditional_model_has_one_condition_without_ids():
    conditions = encode_conditions(tiny_config(), None)
    assert conditions.count == 1
    assert conditions.repeat(5) == Conditions(5)


@pytest.mark.parametrize("negative_prompt", ["fire", ["fire", "fire"]])
def test_one_negative_prompt_serves_all(negative_prompt):
    tokenizer = tiny_tokenizer()
    prompts = {"prompt": ["red", "apple"], "negative_prompt": negative_prompt}
    conditions = encode_conditions(tiny_config("text"), tokenizer, **prompts)
    assert conditions.cond_ids.shape == conditions.negative_cond_ids.shape == (2, L)
    fire = tokenizer("fire")["input_ids"]
    assert conditions.negative_cond_ids.tolist() == [fire + [0] * (L - len(fire))] * 2
