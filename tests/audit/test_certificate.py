"""The certificate of a run is compared with its workdir, and renewed by a verification."""

import json

import pytest

from halos_jax.audit import run
from halos_jax.audit.certificate import check_certificate, renew_certificate, summarise
from halos_jax.audit.findings import differs, not_checked, passed
from halos_jax.workdir.seals import certificate

FOUND = [
    passed("files", "hashes", 3, unit="files"),
    passed("files", "hashes", 4, unit="files"),
    not_checked("samples", "made again", "no checkpoint", 9, "samples"),
]


def outcomes(opened, others=FOUND) -> list[tuple[str, str]]:
    return [(one.outcome, one.why) for one in check_certificate(opened, others)]


def renew(made, mesh1, found=FOUND) -> dict:
    path = renew_certificate(made.open(), found, mesh1)
    return json.loads(path.read_text())


def forge(made, change) -> None:
    """Change a certificate as somebody would who makes its hash again."""
    path = certificate.find_certificate(made.workdir)
    plain = json.loads(path.read_text())
    change(plain)
    plain["sha256"] = certificate.hash_certificate(plain)
    path.write_text(json.dumps(plain))


def test_what_the_run_wrote_passes_and_is_renewed(made, mesh1):
    assert outcomes(made.open()) == [("passed", "")]
    found = renew(made, mesh1)
    assert found["verified"]["counts"] == {"passed": 2, "differs": 0, "not checked": 1}
    assert found["verified"]["findings"] == summarise(FOUND)
    assert found["verified"]["ledger"] == made.open().ledger.head
    assert outcomes(made.open()) == [("passed", ""), ("passed", "")]


def test_a_verification_of_fewer_checks_leaves_it_as_it_is(made, mesh1):
    full = renew(made, mesh1)
    assert renew_certificate(made.open(), FOUND[:1], mesh1) is None
    assert json.loads(certificate.find_certificate(made.workdir).read_text()) == full


def test_findings_are_summarised_over_places():
    assert [(one["places"], one["checked"], one["total"]) for one in summarise(FOUND)] == [
        (2, 7, 7),
        (1, 0, 9),
    ]


@pytest.mark.parametrize("field", ["task", "chain", "weights", "config", "inputs", "metrics"])
def test_a_forged_field_is_found(made, field):
    made.edit_json("final/certificate.json", lambda plain: plain.update(verified=None, x=1))
    assert outcomes(made.open())[0] == ("differs", "it was edited")

    def change(plain):
        plain.pop("x")
        value = plain[field]
        plain[field] = {**value, "head": "00"} if isinstance(value, dict) else "other"

    forge(made, change)
    assert outcomes(made.open()) == [("differs", f"{field} is not that of the workdir")]


def test_weights_that_were_swapped_are_found(made):
    (made.workdir / "final" / "model.safetensors").write_bytes(bytes(98))
    assert outcomes(made.open()) == [("differs", "weights is not that of the workdir")]


def test_claims_that_cannot_be_true_are_found(made, mesh1):
    renew(made, mesh1)

    def claim(plain):
        plain["verified"]["findings"][0].update(checked=999, total=999)

    forge(made, claim)
    wrong = ("differs", "it claims 999 of 999 files for files, there are 7")
    assert outcomes(made.open())[1:] == [wrong]
    renew(made, mesh1)
    forge(made, lambda plain: plain["verified"].update(ledger="00"))
    assert outcomes(made.open())[1:] == [
        ("differs", "the ledger has no line that it was verified at")
    ]


def test_claims_under_other_settings_are_not_compared(made, mesh1):
    renew(made, mesh1)
    (finding,) = list(check_certificate(made.open(samples=3), FOUND))[1:]
    assert finding.outcome == "not checked" and "other settings" in finding.why
    assert outcomes(made.open(output="elsewhere.json"))[1] == ("passed", "")


def test_it_is_not_renewed_where_something_differs_or_is_left_to_do(made, mesh1):
    wrong = [*FOUND, differs("files", "hashes", "x")]
    assert renew_certificate(made.open(), wrong, mesh1) is None
    made.edit_json("config.json", lambda plain: plain.update(segments=[{"exported": False}]))
    assert renew_certificate(made.open(), FOUND, mesh1) is None
    certificate.find_certificate(made.workdir).unlink()
    assert outcomes(made.open())[0][0] == "not checked"


def test_a_card_gets_one_paragraph(made, mesh1):
    card = made.workdir / "final" / "README.md"
    mine = b"# A model\n\nOf mine, in Latin-1: \xe9.\n"
    card.write_bytes(mine)
    first = renew(made, mesh1)
    renew(made, mesh1)
    text = card.read_text(errors="replace")
    assert card.read_bytes().startswith(mine) and text.count("certificate.json") == 1
    assert first["chain"]["head"] in text and "2 checks passed, 1 could not" in text


def test_mode_verify_renews_it(made):
    run.run_verify(made.config)
    found = certificate.read_certificate(certificate.find_certificate(made.workdir))
    assert found["verified"]["counts"]["differs"] == 0
    run.run_verify(made.config)
