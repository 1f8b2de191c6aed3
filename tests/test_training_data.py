"""Images for training: their order, folders and shards, the official evaluation, mixing."""

from __future__ import annotations

import io
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenmodels._data.images import ImageFolder, ImageShards, open_images, shard_paths
from tokenmodels._data.mixing import mix, smoothed
from tokenmodels._data.order import Batches, Draw, Every
from tokenmodels._data.transforms import MEAN, STD, Augmentation, Centre, training_transform
from tokenmodels._seeds import mixed, seeded
from torch import Tensor
from torch.utils.data import DataLoader

PLAIN = Augmentation(transforms="plain")


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of two classes, one of them in a folder below."""
    root = tmp_path_factory.mktemp("images")
    for i, name in enumerate(("b/2.png", "a/1.PNG", "b/10.png", "a/deep/er/1.png", "b/x.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_png(_noise(20 + i, 30, i)))
    (root / "b" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_order(repeats: int, world: int) -> None:
    """Repetitions meet in a step; processes together see each image as often as one would."""
    seen: list[list[list[Draw]]] = []
    for rank in range(world):
        batches = Batches(300, 12 // world, seed=5, repeats=repeats, rank=rank, world=world)
        assert len(batches) == 256 // 12
        seen.append(list(batches))
        assert list(batches) == seen[-1], "an iteration changes the next"
    steps = [[draw for rank in seen for draw in rank[step]] for step in range(256 // 12)]
    counted = Counter(draw.image for step in steps for draw in step)
    assert set(counted.values()) == {repeats} and len(counted) == 252 // repeats
    if repeats == 3:
        assert all(set(Counter(d.image for d in step).values()) == {3} for step in steps)
    assert len({draw.seed for step in steps for draw in step}) == 252, "augmented alike"
    alone = [set(step) for step in Batches(300, 12, seed=5, repeats=repeats)]
    assert [set(step) for step in steps] == alone


def test_order_goes_on_anywhere() -> None:
    batches = Batches(40, 4, seed=1, repeats=2)
    first = list(batches)
    for epoch, step in ((0, 3), (0, 9), (2, 0), (2, 7)):
        batches.begin(epoch, 0)
        whole = list(batches)
        batches.begin(epoch, step)
        assert len(batches) == 10 - step and list(batches) == whole[step:]
        assert epoch == 0 or whole != first
    assert list(Batches(40, 4, seed=2, repeats=2)) != first
    with pytest.raises(ValueError, match="data: images: allowed at least one batch of 41 for each"):
        Batches(40, 41)


def test_every_image_once() -> None:
    for world in (1, 2, 3, 7):
        drawn = [draw.image for rank in range(world) for draw in Every(5, rank=rank, world=world)]
        assert sorted(drawn) == [0, 1, 2, 3, 4]


def test_folders(folder: Path) -> None:
    images = ImageFolder(folder, Centre((16, 16)))
    names = [str(Path(path).relative_to(folder)) for path, _ in images.files]
    assert names == ["a/1.PNG", "a/deep/er/1.png", "b/10.png", "b/2.png", "b/x.png"]
    assert images.classes == ["a", "b"] and [images.files[i][1] for i in range(5)] == [
        0,
        0,
        1,
        1,
        1,
    ]
    x, label = images[Draw(3, 0)]
    assert x.shape == (3, 16, 16) and label == images.highest == 1
    torch.testing.assert_close(x, Centre((16, 16))(_noise(20, 30, 0)))


def _shards(folder: Path, source: ImageFolder, per_shard: int = 2) -> Path:
    """As webdataset's writer makes them."""
    folder.mkdir()
    for i in range(len(source)):
        with tarfile.open(folder / f"part-{i // per_shard:03}.tar", "a") as file:
            content, label, _ = source.read(i)
            cls = ("cls", str(label).encode()) if i % 2 else ("json", b'{"label": %d}' % label)
            for suffix, data in (("png", content), cls, ("seg.png", b"?")):
                info = tarfile.TarInfo(f"sample{i:04}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return folder


def test_shards_of_webdataset(folder: Path, tmp_path: Path) -> None:
    """Written by the package itself."""
    webdataset = pytest.importorskip("webdataset")
    plain = ImageFolder(folder, training_transform((16, 24), PLAIN))
    with webdataset.TarWriter(str(tmp_path / "part-000.tar")) as writer:
        for i in range(len(plain)):
            content, label, _ = plain.read(i)
            writer.write({"__key__": f"sample{i:04}", "png": content, "cls": label})
    shards = open_images(tmp_path, plain.transform)
    assert len(shards) == len(plain)
    for i in range(len(plain)):
        got, want = shards[Draw(i, 7)], plain[Draw(i, 7)]
        assert torch.equal(got[0], want[0]) and got[1] == want[1]


def test_shards_are_read_like_folders(folder: Path, tmp_path: Path) -> None:
    plain = ImageFolder(folder, training_transform((16, 24), PLAIN))
    root = _shards(tmp_path / "shards", plain)
    patterns = [root, f"{root}/part-{{000..002}}.tar", f"{root}/part-*.tar"]
    for pattern in patterns:
        shards = open_images(pattern, plain.transform)
        assert isinstance(shards, ImageShards) and len(shards) == len(plain) == 5
        assert shards.highest == 1
        for i in range(5):
            got, want = shards[Draw(i, 7)], plain[Draw(i, 7)]
            assert torch.equal(got[0], want[0]) and got[1] == want[1]
    assert isinstance(open_images(folder, plain.transform), ImageFolder)
    assert shard_paths(f"{root}/part-{{1..2}}.tar".replace("part-", "part-00")) == [
        f"{root}/part-001.tar",
        f"{root}/part-002.tar",
    ]


def test_bad_images(folder: Path, tmp_path: Path) -> None:
    transform = Centre((16, 16))
    with pytest.raises(FileNotFoundError, match=r"data: shards: allowed files that exist, got .*9"):
        ImageShards(f"{tmp_path}/part-{{9..9}}.tar", transform)
    with pytest.raises(ValueError, match="data: shards: allowed files of this machine"):
        ImageShards("https://example.org/part-{000..146}.tar", transform)
    root = _shards(tmp_path / "shards", ImageFolder(folder, transform), per_shard=5)
    (whole,) = root.iterdir()
    cut, lone, odd = root / "cut.tar", root / "lone.tar", root / "odd.tar"
    cut.write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"data: shards: .*cut.tar"):
        ImageShards(cut, transform)
    for path, files in ((lone, {"a.png": b"x"}), (odd, {"a.png": b"x", "a.cls": b"cat"})):
        with tarfile.open(path, "w") as file:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"allowed samples of an image and a class, got .*: a$"):
        ImageShards(lone, transform)
    with pytest.raises(ValueError, match=r"allowed a class as a number .* a.cls: b'cat'"):
        ImageShards(odd, transform)
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "cut.png").write_bytes(_png(_noise(20, 20))[:200])
    with pytest.raises(ValueError, match=r"data: images: allowed whole image files, got .*cut.png"):
        ImageFolder(tmp_path / "images", transform)[Draw(0, 0)]


def test_augmentation_depends_on_the_draw_alone(folder: Path) -> None:
    """Not on the process, nor on what was read before; reading draws nothing from anybody else."""
    images = ImageFolder(folder, training_transform((16, 16), PLAIN))
    batches = Batches(5, 2, seed=3, repeats=2)
    with seeded(11):
        state = torch.get_rng_state()
        alone = [images[draw] for batch in batches for draw in batch]
        assert torch.equal(torch.get_rng_state(), state)
    loaded = list(DataLoader(images, batch_sampler=batches, num_workers=2))
    assert torch.equal(torch.cat([x for x, _ in loaded]), torch.stack([x for x, _ in alone]))
    assert torch.cat([y for _, y in loaded]).tolist() == [y for _, y in alone]
    assert not torch.equal(images[Draw(0, 1)][0], images[Draw(0, 2)][0])


def test_plain_augmentation() -> None:
    """Crops keep to the scale and the ratio; half of them are mirrored."""
    ramp = torch.arange(200, dtype=torch.uint8)[None, :, None].expand(200, 200, 3)
    image = Image.fromarray(ramp.contiguous().numpy())
    transform = training_transform((32, 32), Augmentation(transforms="plain", scale=(0.25, 0.25)))
    mirrored, spans = 0, []
    for seed in range(200):
        with seeded(seed):
            row = transform(image)[0, 0] * STD[0] + MEAN[0]
        mirrored += int(row[0] > row[-1])
        spans.append(abs(row[-1] - row[0]).item() * 255 / 200 * 32 / 31)
    assert 70 < mirrored < 130
    low, high = (0.5 * ratio**0.5 for ratio in (3 / 4, 4 / 3))
    assert low - 0.03 < min(spans) < low + 0.04 and high - 0.04 < max(spans) < high + 0.03


@pytest.mark.parametrize(
    ("size", "out", "box"),
    [
        ((448, 448), (224, 224), (16, 16)),  # 448 → 256, and its middle
        ((640, 480), (224, 224), (58, 16)),  # → 341 x 256; (341 - 224) / 2 to the even side
        ((480, 642), (224, 224), (16, 59)),  # → 256 x 342
        ((256, 256), (224, 224), (16, 16)),
    ],
)
def test_official_evaluation(
    size: tuple[int, int], out: tuple[int, int], box: tuple[int, int]
) -> None:
    image = _noise(*size)
    short = 256
    width = short if size[0] <= size[1] else int(short * size[0] / size[1])
    height = int(short * size[1] / size[0]) if size[0] <= size[1] else short
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    want = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3)
    left, top = box
    want = want[top : top + 224, left : left + 224].permute(2, 0, 1) / 255
    want = (want - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(Centre(out)(image), want)


def test_official_evaluation_as_torchvision_has_it() -> None:
    transforms = pytest.importorskip("torchvision.transforms", exc_type=ImportError)
    for i, (width, height) in enumerate([(37, 61), (500, 375), (375, 500), (601, 224), (64, 64)]):
        size, image = (224, 288, 64)[i % 3], _noise(width, height, i)
        bicubic = transforms.InterpolationMode.BICUBIC
        official = transforms.Compose(
            [
                transforms.Resize(int(256 / 224 * size), interpolation=bicubic),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        assert torch.equal(Centre((size, size))(image), official(image))


def test_official_augmentation() -> None:
    """By timm: every draw its own, none changed by what was drawn before."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    pytest.importorskip("timm", exc_type=ImportError)
    transform, image = training_transform((224, 192), Augmentation()), _noise(300, 280)
    drawn = []
    for seed in (1, 2, 1):
        with seeded(seed):
            drawn.append(transform(image))
    assert drawn[0].shape == (3, 224, 192) and drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_evaluation_of_other_shapes() -> None:
    assert Centre((288, 288))(_noise(300, 500)).shape == (3, 288, 288)
    assert Centre((128, 320))(_noise(300, 300)).shape == (3, 128, 320)
    assert Centre((320, 64))(_noise(50, 40)).shape == (3, 320, 64)


def test_targets() -> None:
    got = smoothed(torch.tensor([1, 0]), 4, 0.2)
    torch.testing.assert_close(
        got, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]])
    )


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(kind: str) -> None:
    """Of images and targets the same share; pasted rectangles are rectangles; seeds decide."""
    other = "cutmix" if kind == "mixup" else "mixup"
    augmentation = Augmentation(**{other: 0.0}, smoothing=0.0)
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 20, 30).contiguous()
    labels, shares = torch.arange(4), []
    for seed in range(300):
        got, targets = mix(images, labels, 4, augmentation, seed=seed)
        share = targets[0, 0].item()
        shares.append(share)
        torch.testing.assert_close(targets.sum(-1), torch.ones(4))
        torch.testing.assert_close(targets[1], torch.tensor([0, share, 1 - share, 0]))
        torch.testing.assert_close(got[0].mean().item(), 3 * (1 - share), atol=1e-5, rtol=1e-5)
        if kind == "mixup":
            torch.testing.assert_close(got[0], torch.full_like(got[0], 3 * (1 - share)))
        else:
            taken = got[0, 0] == 3
            rows, columns = taken.any(1), taken.any(0)
            assert torch.equal(taken, rows[:, None] & columns)
    assert 0.4 < sum(shares) / 300 < 0.75 and max(shares) > 0.9 and min(shares) < 0.2
    again = mix(images, labels, 4, augmentation, seed=299)
    assert torch.equal(again[0], got) and torch.equal(again[1], targets)
    assert torch.equal(images[3], torch.full((3, 20, 30), 3.0)), "what came is changed"


def test_how_often_which_mixing() -> None:
    """All at the official settings, half and half; none where it is off."""
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])

    def pasted(got: Tensor) -> bool:
        return bool(((got == images) | (got == images.flip(0))).all())

    official = [mix(images, labels, 2, Augmentation(), seed=seed)[0] for seed in range(200)]
    assert 70 < sum(map(pasted, official)) < 130
    none = mix(images, labels, 2, Augmentation(mixup=0, cutmix=0), seed=0)
    never = mix(images, labels, 2, Augmentation(mix=0), seed=0)
    assert torch.equal(none[0], images) and torch.equal(never[0], images)


def test_seeds() -> None:
    """Equal for equal keys, in any process; spread evenly; nothing is left changed behind them."""
    assert mixed("step", 0, 1) == mixed("step", 0, 1) != mixed("step", 1, 0)
    drawn = torch.tensor([mixed("x", i) / 2**63 for i in range(2000)])
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.03
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    with seeded(1):
        one = draw()
        with seeded(2):
            inner = draw()
        after = draw()
    with seeded(1):
        assert (draw(), draw()) == (one, after)
    assert inner not in (one, after)


def test_the_official_transforms_name_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    words = r"package torchvision: allowed with it installed: pip install 'tokenkernels\[train\]'"
    with pytest.raises(ImportError, match=words):
        training_transform((224, 224), Augmentation())
