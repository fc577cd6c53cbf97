"""Phases 0, 1 and 9: what the GPU is, and whether what the stages compute on it is what a CPU computes."""

import shutil
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import synthetic
from benchmarks.acceptance.findings import Findings
from benchmarks.harness import describe_machine, measure_product, run_steady, time_call, time_steady
from pipeline.inference.devices import full_precision
from pipeline.retrieval.device_scores import TIE_TOLERANCE, rank_positives
from pipeline.retrieval.scores import normalise_rows, score_queries
from pipeline.retrieval.whitening import INPUT_POWER, Scatter, collect_scatters, decompose, whiten_within_class

CPU = torch.device("cpu")
OUTPUT_DIM = 256
TEST_IMAGES = 866_000  # of the first city
BRUTE_QUERIES = 300


def measure_device(findings: Findings) -> None:
    """Say what the machine is, how fast it multiplies, and whether float32 is float32 on it."""
    findings.note(machine=describe_machine(), c_compiler=shutil.which("cc") or shutil.which("gcc"))
    if not findings.is_toy:
        free, total = torch.cuda.mem_get_info()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        findings.note(free_gb=free / 1e9, memory_gb=total / 1e9, capability=capability, cuda=torch.version.cuda)
    with findings.part("products"):
        _measure_products(findings)


def _measure_products(findings: Findings) -> None:
    side = 128 if findings.is_toy else 8192
    device, rates = findings.device, {}
    with full_precision():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            rates[str(dtype).removeprefix("torch.")] = measure_product(device, dtype, side) / 1e12
    torch.set_float32_matmul_precision("high")
    rates["tf32"] = measure_product(device, torch.float32, side) / 1e12
    findings.note(products_tflop_per_s=rates)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn((side // 4, side // 4), generator=generator).to(device) for _ in range(2))
    true = a.double() @ b.double()
    with full_precision():  # under TF32, which is set, as an environment may set it
        exact = a @ b
    for name, product, most in (("bfloat16", a.bfloat16() @ b.bfloat16(), 2e-2), ("float32", exact, 1e-5)):
        error = float((product.double() - true).norm() / true.norm())
        findings.check(f"a product in {name}, relative error", error, at_most=most)


def compare_with_cpu(findings: Findings) -> None:
    """Compare validation's search, the scatters, an eigen-decomposition and the whitening with the CPU's."""
    with findings.part("validation search"):
        _compare_search(findings)
    rows, width = (600, 64) if findings.is_toy else (65_536, 4_096)
    features, codes = _draw_features(rows, width)
    with findings.part("scatter and whitening"):
        scatters = _compare_scatters(findings, features, codes)
        with findings.part("eigen-decomposition"):
            _check_decomposition(findings, scatters[0])
    with findings.part("whitening, all of it on the CPU"):  # which decomposes wide matrices by one thread
        narrow = np.ascontiguousarray(features[:, : min(width, 1_024)])
        here, there = (collect_scatters(narrow, codes, (1.0,), device)[0] for device in (CPU, findings.device))
        _compare_maps(findings, "whitening", features=narrow, here=here, there=there)


def _draw_features(num_rows: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return correlated features (N, D) with noise in every direction and a mean, and their buildings (N,)."""
    generator = np.random.default_rng(0)
    codes = synthetic.draw_buildings(generator, num_rows)
    features = synthetic.draw_values(generator, codes, width)
    features += 0.3 * generator.standard_normal(features.shape, np.float32) + 1.0
    return features, codes.astype(np.int32)


def _compare_search(findings: Findings) -> None:
    features, codes = _draw_features(500 if findings.is_toy else 20_000, OUTPUT_DIM)
    rows = normalise_rows(features + 2 * np.random.default_rng(1).standard_normal(features.shape, np.float32))
    here, there = (score_queries(rows, codes, device=device) for device in (CPU, findings.device))
    differs = here.first_rank != there.first_rank
    # Sums in another order move a similarity by 1e-7, so that two neighbours may change places.
    findings.check("search: share of queries with another rank", float(differs.mean()), at_most=1e-3)
    distance = abs(float(here.average_precision.mean() - there.average_precision.mean()))
    findings.check("search: difference in mAP", distance, at_most=1e-5)
    findings.note(search_map=here.average_precision.mean(),
                  search_s=time_steady(lambda: score_queries(rows, codes, device=findings.device)))  # fmt: skip


def _compare_scatters(findings: Findings, features: NDArray[np.float32], codes: NDArray[np.int32]) -> list[Scatter]:
    """Compare what one pass over the rows sums up, for both powers of the start, and return the device's."""
    powers = (1.0, INPUT_POWER)
    here = collect_scatters(features, codes, powers, CPU)
    there = collect_scatters(features, codes, powers, findings.device)
    findings.note(scatter_s=time_call(lambda: collect_scatters(features, codes, powers, findings.device)))
    # A CPU multiplies so many rows in float32; so is a power, where two libraries differ in the last bit.
    for power, most, one, other in zip(powers, (1e-6, 1e-5), here, there, strict=True):
        for name in ("mean", "within", "between"):
            expected, found = getattr(one, name), getattr(other, name)
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            findings.check(f"scatter to the power {power:g}: {name}, relative difference", error, at_most=most)
    one = replace(here[0], device=findings.device)
    _compare_maps(findings, "whitening, both decomposed there", features=features, here=one, there=there[0])
    return there


def _compare_maps(
    findings: Findings, name: str, *, features: NDArray[np.float32], here: Scatter, there: Scatter
) -> None:
    """Compare the whitenings of two scatters by the cosines between the rows that they map.

    Not by their weights: directions of nearly one variance may turn among themselves.
    """
    output_dim = min(OUTPUT_DIM, features.shape[1] // 2)
    mapped = [whiten_within_class(one, output_dim).apply(features[:1_000]).astype(np.float64) for one in (here, there)]
    one, other = (rows @ rows.T for rows in mapped)
    findings.check(f"{name}: largest difference of a cosine", float(np.abs(one - other).max()), at_most=1e-3)


def _check_decomposition(findings: Findings, scatter: Scatter) -> None:
    """Check an eigen-decomposition on the device by what defines it."""
    matrix, device = scatter.within, findings.device
    values, vectors = decompose(matrix, device)
    findings.note(eigen_decomposition_s=time_call(lambda: decompose(matrix, device)))
    residual = np.linalg.norm(matrix @ vectors - vectors * values) / np.linalg.norm(matrix)
    findings.check("eigen-decomposition: residual", float(residual), at_most=1e-10)
    turned = np.abs(vectors.T @ vectors - np.eye(len(vectors))).max()
    findings.check("eigen-decomposition: orthogonality", float(turned), at_most=1e-10)


def rank_many(findings: Findings) -> None:
    """Rank the positives of many images at a backbone's width, and check some by brute force."""
    count, width = (500, 64) if findings.is_toy else (200_000, 4_096)
    with findings.part("the phase's own data"):
        codes = synthetic.draw_buildings(np.random.default_rng(0), count)
        values = synthetic.draw_values(np.random.default_rng(1), codes, width)
        values += np.random.default_rng(2).standard_normal(width, np.float32) / 8
        rows = normalise_rows(values)
    with findings.part("ranks"):
        no_pairs = np.empty((0, 2), np.int64)
        seconds, [(queries, ranks, _), _] = run_steady(
            lambda: rank_positives(rows, codes, no_pairs, np.arange(len(codes)), findings.device), rounds=1
        )
        findings.note(rank_s=seconds, rank_s_of_all_images=seconds * (TEST_IMAGES / count) ** 2)
    with findings.part("brute force"):
        all_rows, all_codes = torch.from_numpy(rows).to(findings.device).double(), torch.from_numpy(codes)
        num_wrong = 0
        places = np.random.default_rng(3).permutation(len(queries))[:BRUTE_QUERIES]
        for query, rank in zip(queries[places].tolist(), ranks[places], strict=True):
            similarities = (all_rows @ all_rows[query]).cpu()
            same = all_codes == all_codes[query]
            own = same.clone()
            own[query] = False
            nearest, others = similarities[own].max(), similarities[~same]
            least, most = (1 + int((others > nearest - sign * 2 * TIE_TOLERANCE).sum()) for sign in (-1, 1))
            num_wrong += not least <= rank <= most
        findings.check(f"wrong of {BRUTE_QUERIES} ranks by brute force", num_wrong, at_most=0)
