"""Trainium1 and Inferentia2: NeuronCore-v2, second generation.

Streaming costs are the documented formulas; startups are trn2's cycles at this clock.
"""

from __future__ import annotations

from nki_kernels.hardware.laws import LawTable
from nki_kernels.hardware.origin import documented, estimated, measured
from nki_kernels.hardware.trn2 import TRN2

ARCH = "AWS Neuron SDK 2.32, nki/guides/architecture/trainium_inferentia2_arch"
PERF = "AWS Neuron SDK 2.26, NKI performance guide and nki.isa cost formulas"
TUTORIAL = "AWS NKI matrix-multiplication tutorial, trn1: 212.7 ns per 128x128x512"
SCALED = "trn2 cycles at the trn1 clock"

# 264 cycles between dependent one-element activations (performance guide, figure 16), of which
# 222 are the instruction; a table lookup adds the 124 cycles it adds on trn2.
_ACT = 222 / 1.4
_LUT = 346 / 1.4
_DVE = 150 / 1.12
_POOL = 150 / 1.4

_BASE = TRN2.as_estimates("as trn2")

TRN1 = _BASE.derive(
    name="trn1",
    generation=documented(2, ARCH),
    sbuf_bytes=documented(192 * 1024, ARCH),
    sbuf_usable_bytes=documented(192 * 1024 - 16384, "AWS NKI allocator limit: 180,224 B"),
    hbm_bytes_per_ns=documented(272.0, "AWS Neuron SDK 2.32, nki-dma-bandwidth-guide"),
    op_laws=LawTable(()),
    pe=_BASE.pe.derive(
        clock_ghz=documented(2.8, ARCH),
        overhead_short_cycles=estimated(83.0, "as at n=512", low=6.0, high=83.0),
        overhead_long_cycles=measured(83.0, TUTORIAL),
        transpose_fp32_ns=estimated(403 / 2.8, SCALED),
        transpose_fp32_throttled_ns=estimated(403 / 2.8, "no throttle documented"),
        drain_ns=estimated(410 / 2.8, SCALED, low=80.0, high=200.0),
        double_row_rows=documented(1, ARCH),
        throttle=estimated(1.0, "none documented", low=0.5, high=1.0),
        cold_front_ns=estimated(15.0, "as trn2"),
        cold_front_fp32_ns=estimated(100.0, "as trn2"),
    ),
    vector=_BASE.vector.derive(
        clock_ghz=documented(1.12, ARCH),
        startup_ns=estimated(_DVE, SCALED),
        psum_startup_ns=estimated(_DVE, SCALED),
        memset_startup_ns=estimated(56 / 1.12, SCALED),
        gap_ns=estimated(100 / 1.12, SCALED, low=0.0, high=150.0),
        two_input_cycles=documented(2.0, PERF),
        two_input_2byte_cycles=documented(1.0, PERF),
        copy_2byte_cycles=documented(1.0, PERF),
        copy_2byte_strided_cycles=documented(1.0, PERF),
        copy_2byte_psum_cycles=documented(1.0, PERF),
        copy_4byte_cycles=documented(1.0, PERF),
        copy_widening_cycles=documented(1.0, PERF),
        copy_narrow_cycles=documented(1.0, PERF),
        copy_psum_cycles=documented(1.0, PERF),
        psum_two_input_cycles=documented(1.0, PERF),
        reduce_2byte_cycles=documented(0.5, PERF),
        reciprocal_cycles=documented(8.0, PERF),
        memset_cycles=documented(1.0, PERF),
        fused_two_input_cycles=documented(2.0, PERF),
        scan_seed_ns=estimated(58 / 1.12, SCALED),
        mask_load_ns=estimated(12 / 1.12, SCALED),
        transpose_startup_ns=estimated(192 / 1.12, SCALED),
        shares_gpsimd_port=documented(True, ARCH),
        gpsimd_exclusive=documented(True, ARCH),
    ),
    scalar=_BASE.scalar.derive(
        clock_ghz=documented(1.4, ARCH),
        startup_ns=estimated(_ACT, SCALED),
        psum_startup_ns=estimated(190 / 1.4, SCALED),
        memset_startup_ns=estimated(_ACT, "as a copy"),
        lut_startup_ns=estimated(_LUT, SCALED),
        lut_psum_startup_ns=estimated(306 / 1.4, SCALED),
        gap_ns=estimated(110 / 1.4, SCALED, low=0.0, high=110.0),
        vector_read_ns=estimated(109 / 1.4, SCALED),
        accumulator_forward_ns=estimated(241 / 1.4, SCALED),
        read_accumulator_ns=estimated(335 / 1.4, SCALED),
        read_accumulator_issue_ns=estimated(222 / 1.4, SCALED),
        table_load_ns=estimated(1540 / 1.4, SCALED),
        psum_exclusive=documented(True, ARCH),
    ),
    gpsimd=_BASE.gpsimd.derive(
        clock_ghz=documented(1.4, ARCH),
        startup_ns=estimated(212 / 1.4, SCALED),
        psum_startup_ns=estimated(212 / 1.4, SCALED),
        memset_startup_ns=documented(_POOL, PERF),
        gap_ns=documented(_POOL, PERF),
    ),
    dma=_BASE.dma.derive(
        engine_bytes_per_ns=measured(
            18.1, "AWS performance guide: 32 KiB packet in 1810 ns", low=17.0
        ),
        load_dispatch_ns=estimated(
            1000.0, "performance guide: about 1.3 us start latency", high=1300.0
        ),
        store_dispatch_ns=estimated(750.0, "trn2's ratio of store to load"),
        load_notify_ns=estimated(300.0, "as trn2"),
        store_notify_ns=estimated(300.0, "as trn2"),
        hw_queue_ns=estimated(600.0, "this generation has no hardware DGE; as software DGE"),
    ),
    sync=_BASE.sync.derive(
        same_engine_ns=measured(30.0, "AWS performance guide, figure 16: period 189, duration 159"),
        other_engine_ns=estimated(40.0, "as trn2", low=24.0, high=100.0),
        launch_ns=measured(
            14000.0, "AWS mamba tutorial: first DMA at 12 us", low=12000.0, high=16000.0
        ),
        pair_bytes_per_ns=documented(820.0, f"{ARCH}: HBM of the device, two cores"),
    ),
)
