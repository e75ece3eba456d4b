import pytest
import torch
from number_training import assert_equal
from torch import nn

from rq_hf import ResidualQuantizer
from rq_hf.training import EMA


class TestEMA:
    def test_is_the_moving_average_of_parameters_and_buffers(self):
        model = nn.BatchNorm1d(3)
        ema = EMA(model, decay=0.2)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # (1 + step) / (10 + step) in the first steps
            for name, tensor in model.state_dict().items():
                if name == "num_batches_tracked":
                    expected[name] = tensor.add_(1).clone()
                else:
                    tensor.copy_(torch.randn(3))
                    expected[name] = decay * expected[name] + (1 - decay) * tensor
            ema.update()
        torch.testing.assert_close(ema.state_dict()["average"], expected)

    def test_codebooks_are_copied(self):
        model = nn.Sequential(nn.Linear(4, 4), ResidualQuantizer(codebook_size=8, codebook_dim=4, depth=2))
        ema = EMA(model, decay=0.9)
        for _ in range(3):  # of two vectors each, so that most codewords are restarted every time
            nn.init.normal_(model[0].weight)
            model(torch.randn(2, 4))
            ema.update()
        assert_equal(model[1].state_dict(), {n.removeprefix("1."): t for n, t in ema.average.items() if n[0] == "1"})
        assert not torch.equal(model[0].weight, ema.average["0.weight"])

    def test_warms_up(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        ema = EMA(model, decay=0.999)
        nn.init.ones_(model.weight)
        distance = 1.0
        for step in (0, 1, 2):
            ema.update()
            distance *= (1 + step) / (10 + step)
            assert ema.average["weight"].item() == pytest.approx(1 - distance)

    def test_is_applied_inside_the_context_only(self):
        model = nn.BatchNorm1d(3)
        ema = EMA(model, decay=0.9)
        nn.init.normal_(model.weight)
        nn.init.normal_(model.running_mean)
        ema.update()
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(RuntimeError), ema.applied():
            assert_equal(model.state_dict(), ema.average)
            assert not torch.equal(model.weight, trained["weight"])
            raise RuntimeError
        assert_equal(model.state_dict(), trained)

    def test_goes_on_from_its_state(self, tmp_path):
        model, other = nn.Linear(2, 2), nn.Linear(2, 2)
        ema, restored = EMA(model, 0.9), EMA(other, 0.9)
        nn.init.normal_(model.weight)
        ema.update()
        torch.save(ema.state_dict(), tmp_path / "ema.pt")
        restored.load_state_dict(torch.load(tmp_path / "ema.pt"))
        other.load_state_dict(model.state_dict())
        for each in (ema, restored):
            each.update()
        assert_equal(restored.average, ema.average)
