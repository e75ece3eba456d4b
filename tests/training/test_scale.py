"""Several processes: equal codebooks, every example once, runs that are killed, sharded parameters."""

import functools
import random
import signal
import subprocess
import sys
import time

import datasets
import psutil
import pytest
import torch
import torch.distributed as dist
import training_process
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from number_streams import batch_of, epochs
from processes import die_while_saving, run_group
from safetensors.torch import load_file
from scripts import CLASSES, EXAMPLES, MAR, RESOLUTION, RQVAE, TEXT, TINY_MAR, TINY_RQVAE, TINY_TRANSFORMER
from shapes import CAPTIONS, write_shapes
from tiny import C, D, H, W, tiny_codes, tiny_condition, tiny_transformer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from training_process import die_around_step, set_environment, shard_on_cpus, train_and_keep

from rq_hf import RQTransformerModel, RQVAEModel
from rq_hf.data import load_image_dataset
from rq_hf.data.loading import number_examples
from rq_hf.models.rq_transformer.modeling_rq_transformer import RQBlock

CONFIGS = EXAMPLES / "accelerate_configs"
LATEST = ["--resume_from_checkpoint", "latest"]

both_methods = pytest.mark.parametrize("script", [CLASSES, MAR], ids=lambda path: path.stem)
both_stages = pytest.mark.parametrize("script", [RQVAE, TEXT], ids=lambda path: path.stem)


def assert_same_states(folder, expected_folder, world_size):
    for rank in range(world_size):
        actual, expected = torch.load(folder / f"{rank}.pt"), torch.load(expected_folder / f"{rank}.pt")
        assert actual.keys() == expected.keys()
        assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(script, folder, further options) -> its command line: a shuffled stream, dropout, mirroring, sampled codes."""
    folder = tmp_path_factory.mktemp("sources")
    files = write_shapes(folder / "shapes", count=20, resolution=RESOLUTION, num_shards=3)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"codebook_dim": 8, "codebook_size": 16, "depth": 2, "sample_size": RESOLUTION}
    RQVAEModel(**levels, **sizes, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder / "rqvae")
    prompts = ["--text_length", 6, "--validation_prompts", "a red circle"]
    transformer = [*TINY_TRANSFORMER, "--rqvae", folder / "rqvae"]
    own = {RQVAE: TINY_RQVAE, TEXT: [*transformer, *prompts], CLASSES: [*transformer, "--num_samples", 2]}
    own[MAR] = [*TINY_MAR, "--vae", folder / "rqvae", "--num_samples", 2]
    common = [
        *("--cpu", "--data_files", files, "--streaming", "--shuffle_buffer_size", 6, "--random_flip"),
        *("--train_batch_size", 4, "--lr_warmup_steps", 2, "--logging_steps", 1, "--report_to", "none"),
    ]

    def arguments(script, folder, *further):
        return [*map(str, [*common, *own[script], "--output_dir", folder / "run", *further])]

    return arguments


class TestKilled:
    STEPS = ["--max_train_steps", 12, "--checkpointing_steps", 3, "--image_logging_steps", 5]

    @pytest.fixture(scope="class")
    @classmethod
    def unbroken(cls, command, tmp_path_factory):
        """(script, world size) -> folder with the states of all ranks after an unbroken run."""

        @functools.cache
        def finished(script, world_size):
            folder = tmp_path_factory.mktemp("unbroken")
            arguments = command(script, folder, *cls.STEPS)
            for outcome in run_group(world_size, train_and_keep, folder, script, arguments):
                assert outcome.code == 0, outcome.output
            return folder

        return finished

    @both_stages
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_again_and_again_at_random_moments(self, script, world_size, command, unbroken, tmp_path):
        arguments = command(script, tmp_path, *self.STEPS, *LATEST)
        draw, kills, codes = random.Random(world_size), 0, None
        while codes != [0] * world_size:
            die = functools.partial(die_around_step, draw.randint(4, 7))  # when the next checkpoint has been written
            outcomes = run_group(world_size, train_and_keep, tmp_path, script, arguments, die)
            codes = [outcome.code for outcome in outcomes]
            assert -signal.SIGKILL in codes or not any(codes), [outcome.output for outcome in outcomes]
            kills += -signal.SIGKILL in codes
        assert kills >= 1
        assert_same_states(tmp_path, unbroken(script, world_size), world_size)

    @both_stages
    def test_while_the_second_process_writes_to_a_checkpoint(self, script, command, unbroken, tmp_path):
        arguments = command(script, tmp_path, *self.STEPS, *LATEST)
        die = functools.partial(die_while_saving, "checkpoint-6/random_states_1.pkl")
        codes = [outcome.code for outcome in run_group(2, train_and_keep, tmp_path, script, arguments, die)]
        assert codes[0] and codes[1] == -signal.SIGKILL
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
        for outcome in run_group(2, train_and_keep, tmp_path, script, arguments):
            assert outcome.code == 0, outcome.output
        assert_same_states(tmp_path, unbroken(script, 2), 2)


def start_by_torchrun(folder, script, arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(folder / "output", "a") as output:
        command = [*torchrun, training_process.__file__, folder, script, *arguments]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def wait_for_some_steps(folder, process):
    log, steps = folder / "run" / "log.jsonl", random.randint(12, 40)
    while not log.exists() or log.read_text().count('"step"') < steps:
        assert process.poll() is None, (folder / "output").read_text()
        time.sleep(0.001)


@pytest.mark.slow
class TestTorchrun:
    STEPS = ["--max_train_steps", 50, "--checkpointing_steps", 10, "--image_logging_steps", 0, "--ema_decay", 0]

    @pytest.fixture(scope="class")
    @classmethod
    def killed_and_resumed(cls, command, tmp_path_factory):
        """Folder with the states of two processes that were killed from outside, at a random moment, and resumed."""
        folder = tmp_path_factory.mktemp("torchrun")
        arguments = command(RQVAE, folder, *cls.STEPS, *LATEST)
        process = start_by_torchrun(folder, RQVAE, arguments)
        wait_for_some_steps(folder, process)
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in family:
            member.kill()
        for member in family:
            member.wait()
        assert not (folder / "0.pt").exists()
        assert start_by_torchrun(folder, RQVAE, arguments).wait() == 0, (folder / "output").read_text()
        return folder

    def test_both_processes_have_bit_identical_codebooks(self, killed_and_resumed):
        ours, theirs = (torch.load(killed_and_resumed / f"{rank}.pt") for rank in range(2))
        for name in ("codebook", "cluster_size", "cluster_sum"):
            assert torch.equal(ours[f"quantizer.{name}"], theirs[f"quantizer.{name}"])
        assert ours["quantizer.cluster_size"].sum() > 0

    def test_states_are_those_of_an_unbroken_run(self, killed_and_resumed, command, tmp_path):
        for outcome in run_group(2, train_and_keep, tmp_path, RQVAE, command(RQVAE, tmp_path, *self.STEPS)):
            assert outcome.code == 0, outcome.output
        assert_same_states(killed_and_resumed, tmp_path, 2)

    def test_terminated_and_resumed_they_are_the_same(self, killed_and_resumed, command, tmp_path):
        arguments = command(RQVAE, tmp_path, *self.STEPS, "--checkpointing_steps", 100, *LATEST)
        process = start_by_torchrun(tmp_path, RQVAE, arguments)
        wait_for_some_steps(tmp_path, process)
        process.terminate()
        assert process.wait() != 0
        (stopped,) = (tmp_path / "run").glob("checkpoint-*")
        expected = f"SIGTERM stopped the run: go on with --resume_from_checkpoint {stopped}"
        assert expected in (tmp_path / "output").read_text()
        assert start_by_torchrun(tmp_path, RQVAE, arguments).wait() == 0, (tmp_path / "output").read_text()
        assert_same_states(tmp_path, killed_and_resumed, 2)


def generate(shards):
    for shard in shards:
        yield from ({"number": number} for number in shard)


class TestTwoRanksShareAStream:
    @pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("shuffle_buffer_size", [1, 6])
    def test_of_parquet_files(self, num_shards, shuffle_buffer_size, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        files = write_shapes(tmp_path, count=13, num_shards=num_shards)
        dataset = load_image_dataset(data_files=files, streaming=True)
        self.check(dataset, "text", CAPTIONS[:13], shuffle_buffer_size)

    @pytest.mark.parametrize("num_shards", [1, 2, 3])
    @pytest.mark.parametrize("shuffle_buffer_size", [1, 6])
    def test_of_a_generator(self, num_shards, shuffle_buffer_size):
        shards = [range(start, 13, num_shards) for start in range(num_shards)]
        dataset = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": shards})
        self.check(number_examples(dataset), "number", list(range(13)), shuffle_buffer_size)

    def check(self, dataset, column, expected, shuffle_buffer_size):
        """Each epoch has every example once."""

        def collate(examples):
            return batch_of([example[column] for example in examples])

        ranks = [
            epochs(3, dataset, collate, rank=rank, world_size=2, shuffle_buffer_size=shuffle_buffer_size)
            for rank in range(2)
        ]
        for epoch in range(3):
            shares = [sum(rank[epoch], []) for rank in ranks]
            assert all(shares)
            assert sorted(shares[0] + shares[1]) == sorted(expected)


def launch_arguments(name):
    """What `accelerate launch --config_file` makes of a configuration."""
    parser = launch_command_parser()
    return _validate_launch_command(parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"]))[0]


class TestAccelerateConfigurations:
    @pytest.mark.parametrize(
        ("name", "kind", "num_processes"),
        [
            ("single_gpu", DistributedType.NO, 1),
            ("ddp_8_gpus", DistributedType.MULTI_GPU, 8),
            ("fsdp2_8_gpus", DistributedType.FSDP, 8),
            ("deepspeed_zero2_8_gpus", DistributedType.DEEPSPEED, 8),
        ],
    )
    def test_loads(self, name, kind, num_processes):
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, num_processes, "bf16")

    def test_fsdp2_shards_by_block(self, monkeypatch):
        for name, value in prepare_multi_gpu_env(launch_arguments("fsdp2_8_gpus")).items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward
        assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
        assert not plugin.activation_checkpointing
        assert not plugin.cpu_ram_efficient_loading
        model = tiny_transformer()
        is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
        assert [m for m in model.modules() if is_unit(m)] == [m for m in model.modules() if isinstance(m, RQBlock)]

    def test_deepspeed_shards_optimizer_states(self, monkeypatch):
        arguments = launch_arguments("deepspeed_zero2_8_gpus")
        arguments.deepspeed_fields_from_accelerate_config = ""
        for name, value in prepare_deepspeed_cmd_env(arguments)[1].items():
            monkeypatch.setenv(name, value)
        config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == 2
        assert config["gradient_accumulation_steps"] == "auto"  # the script's
        assert config["gradient_clipping"] == 1.0


def text_to_image_model():
    torch.manual_seed(0)
    return tiny_transformer("text").train()


def take_two_steps(model, part):
    """Trains on a part of four images. Without Adam, which makes steps of gradients that are zero but for rounding."""
    torch.manual_seed(1)
    codes, cond_ids, residuals = tiny_codes(4), tiny_condition("text", 4), torch.randn(4, H, W, D, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(codes[part], cond_ids[part], residuals=residuals[part], return_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_sharded(folder):
    """Saves the model after two steps with FSDP2, and the number of parameters that each rank holds."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = text_to_image_model()
    for module in model.modules():
        if isinstance(module, RQBlock):
            fully_shard(module)
    fully_shard(model)
    take_two_steps(model, slice(2 * rank, 2 * rank + 2))
    torch.save(sum(parameter.to_local().numel() for parameter in model.parameters()), folder / f"{rank}.pt")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=state)
    dist.destroy_process_group()


def test_sharded_parameters_train_as_whole_ones(tmp_path):
    for outcome in run_group(2, train_sharded, tmp_path):
        assert outcome.code == 0, outcome.output
    sharded = RQTransformerModel.from_pretrained(tmp_path / "model")
    whole = text_to_image_model()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    take_two_steps(whole, slice(4))
    torch.testing.assert_close(sharded.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(before["classifier.weight"], whole.classifier.weight, atol=1e-3)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(shares) == whole.num_parameters()
    assert max(shares) < 0.6 * sum(shares)


@pytest.mark.parametrize("option", ["--num_processes=2", "--num-processes=2"])
def test_processes_that_accelerate_does_not_start_are_missed(option, command, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", option, RQVAE]
    done = subprocess.run([*launch, *command(RQVAE, tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"use torchrun --nproc_per_node 2 {RQVAE} --cpu" in done.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()


class TestShardedByConfiguration:
    """Stage 2 in two processes, by FSDP2 as `fsdp2_8_gpus.yaml` says."""

    STEPS = ["--max_train_steps", 6, "--checkpointing_steps", 2, "--image_logging_steps", 3, "--ema_decay", 0.5]

    @pytest.fixture
    def shard(self):
        environment = prepare_multi_gpu_env(launch_arguments("fsdp2_8_gpus"))
        settings = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
        return functools.partial(shard_on_cpus, settings)

    def test_is_refused_for_an_rqvae(self, shard, command, tmp_path):
        for outcome in run_group(2, train_and_keep, tmp_path, RQVAE, command(RQVAE, tmp_path, *self.STEPS), shard):
            assert outcome.code != 0
            assert "an autoencoder is trained with plain data parallelism" in outcome.output

    def test_is_missed_on_a_cpu(self, command, tmp_path):
        use = functools.partial(set_environment, {"ACCELERATE_USE_FSDP": "true"})
        for outcome in run_group(2, train_and_keep, tmp_path, CLASSES, command(CLASSES, tmp_path, *self.STEPS), use):
            assert outcome.code != 0
            assert "which accelerate does on GPUs only" in outcome.output

    def weights(self, script, folder, arguments, *before):
        """Of the pipeline that the script saves."""
        folder.mkdir(exist_ok=True)
        for outcome in run_group(2, train_and_keep, folder, script, arguments, *before):
            assert outcome.code == 0, outcome.output
        return load_file(folder / "run" / "pipeline" / "transformer" / "model.safetensors")

    @both_methods
    def test_ends_with_the_weights_of_ddp(self, script, shard, command, tmp_path):
        first = [*self.STEPS, "--max_train_steps", 1]
        self.weights(script, tmp_path / "first", command(script, tmp_path / "first", *first))
        further = [*self.STEPS, "--mixed_precision", "no", "--learning_rate", 0.01]
        further += ["--transformer", tmp_path / "first" / "run" / "pipeline" / "transformer"]
        whole = self.weights(script, tmp_path / "ddp", command(script, tmp_path / "ddp", *further))
        sharded = self.weights(script, tmp_path / "fsdp", command(script, tmp_path / "fsdp", *further), shard)
        torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-4)

    @both_methods
    def test_killed_ends_with_the_weights_of_an_unbroken_run(self, script, shard, command, tmp_path):
        arguments = command(script, tmp_path / "unbroken", *self.STEPS)
        expected = self.weights(script, tmp_path / "unbroken", arguments, shard)
        folder = tmp_path / "killed"
        folder.mkdir()
        arguments = command(script, folder, *self.STEPS, *LATEST)
        run_group(2, train_and_keep, folder, script, arguments, shard, functools.partial(die_around_step, 4))
        assert (folder / "run" / "checkpoint-2" / "pytorch_model_fsdp_0").exists()
        actual = self.weights(script, folder, arguments, shard)
        assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
