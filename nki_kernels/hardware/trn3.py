"""Trainium3: NeuronCore-v4, fourth generation.

Peaks are documented; every cost of an instruction is projected from trn2.
"""

from __future__ import annotations

from nki_kernels.hardware.laws import LawTable
from nki_kernels.hardware.origin import documented, estimated
from nki_kernels.hardware.trn2 import TRN2

ARCH = "AWS Neuron SDK 2.32, nki/guides/architecture/trainium3_arch"
CYCLES = "trn2 cycles at the trn3 clock"
_RATIO = 0.96 / 1.2

_BASE = TRN2.as_estimates("as trn2")

TRN3 = _BASE.derive(
    name="trn3",
    generation=documented(4, ARCH),
    projected=True,
    sbuf_bytes=documented(256 * 1024, ARCH),
    sbuf_usable_bytes=estimated(256 * 1024 - 16384, "no public number; trn2's reserve"),
    hbm_bytes_per_ns=documented(528.0, "AWS Neuron SDK 2.32, nki-dma-bandwidth-guide"),
    op_laws=LawTable(()),
    pe=_BASE.pe.derive(mx_rows=documented(4, ARCH)),
    vector=_BASE.vector.derive(
        clock_ghz=documented(1.2, ARCH),
        startup_ns=estimated(TRN2.vector.startup_ns * _RATIO, CYCLES),
        psum_startup_ns=estimated(TRN2.vector.psum_startup_ns * _RATIO, CYCLES),
        memset_startup_ns=estimated(TRN2.vector.memset_startup_ns * _RATIO, CYCLES),
        gap_ns=estimated(TRN2.vector.gap_ns * _RATIO, CYCLES, low=0.0, high=150.0),
        copy_narrow_cycles=estimated(0.26, "fp8 has the 2-byte fast modes"),
        scan_seed_ns=estimated(TRN2.vector.scan_seed_ns * _RATIO, CYCLES),
        mask_load_ns=estimated(TRN2.vector.mask_load_ns * _RATIO, CYCLES),
        transpose_startup_ns=estimated(TRN2.vector.transpose_startup_ns * _RATIO, CYCLES),
    ),
    scalar=_BASE.scalar.derive(fast_2byte_cycles=documented(0.5, ARCH)),
    dma=_BASE.dma.derive(
        engine_bytes_per_ns=estimated(
            35.3, "33 B/ns documented net, trn2's ratio", low=33.0, high=38.4
        ),
        compute_share=documented(1.0, ARCH),
    ),
    sync=_BASE.sync.derive(
        pair_bytes_per_ns=documented(1175.0, f"{ARCH}: 4.7 TB/s over four core pairs"),
    ),
)
