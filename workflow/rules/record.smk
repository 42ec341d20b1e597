# The default profile's results are versioned, where the checkout is a DVC repository and DVC itself is not the caller
# (it sets DVC_STAGE for its commands).
RECORD = (
    RUN == "digits"
    and Path(".dvc/config").exists()
    and Path(".git").exists()
    and "DVC_STAGE" not in os.environ
)
RECORDED = ".dvc/tmp/recorded"


rule record:
    """Bring dvc.yaml up to date and have DVC cache what this workflow made, so that `dvc repro` has nothing to do."""
    input:
        REPORT.values(),
    output:
        touch(RECORDED),
    log:
        f"{LOGS}/record.log",
    conda:
        "../envs/ebjdat.yaml"
    shell:
        "(python workflow/scripts/dvc_stages.py --inputs $EBJDAT_INPUTS && dvc commit --force) 2>&1 | tee -i {log}"
