"""What was counted of a large mesh, as the page tells it, and how it is read from a program's text."""

from pathlib import Path

from benchmarks.harness import read_result
from benchmarks.mesh_counts import collectives_of, on_paper

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
TEXT = """
  %a = f32[8,64]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/while/body/dot"}
  %b = (pred[], bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/dot"}
  %c = f32[8,128]{0,1} all-gather-start(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, metadata={op_name="while/body/x"}
  %d = s32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(f)/while/body/x"}
  %e = f32[8,128]{0,1} add(%c, %c), metadata={op_name="jit(f)/while/body/all-reduce"}
"""


def test_collectives_are_read_from_text() -> None:
    found = [(one.kind, one.elements, one.bytes, one.group, one.in_step) for one in collectives_of(TEXT)]
    assert found == [
        ("all-reduce", 512, 2048, 4, True),
        ("all-reduce", 7, 13, 4, False),
        ("all-gather", 1024, 4096, 4, False),
        ("collective-permute", 4, 16, 2, True),
    ]


def test_counts_grow_with_layers_and_the_page_has_them() -> None:
    result = read_result("mesh_counts")
    for one in result["depths"]:
        assert one["collectives_in_step"] == {"all-reduce": 2 * one["layers"] + 3, "all-gather": 1}
    whole = result["depths"][-1]
    assert whole["layers"] == 80
    for one in whole["tally"]:
        assert one["bytes"] < 10 or f"| {one['times']} | {one['bytes']:,} | {one['group']} devices" in PAGE
    assert all(f"| {1e-9 * held:.2f} |" in PAGE for held in whole["held_bytes"].values())
    paper = on_paper(whole)
    assert paper == result["on_paper"]
    assert f"{paper['sent_bytes'] / 1e6:.1f} MB in {paper['hops']:,} hops" in PAGE
    for name in ("TPU v5e", "H100 SXM"):
        assert f"{paper[name]['sending_ms']:.2f} ms" in PAGE
        assert f"{paper[name]['reading_ms']:.3g} ms" in PAGE
