# A profile's own results are versioned, where the checkout is a DVC repository and DVC itself is not the caller (it sets
# DVC_STAGE for its commands). Overridden runs are trials and are not.
RECORD = (
    not OVERRIDES
    and Path(".dvc/config").exists()
    and Path(".git").exists()
    and "DVC_STAGE" not in os.environ
)
sys.path.append(f"{workflow.basedir}/workflow/scripts")
import dvc_results
import dvc_stages

RECORDED = dvc_stages.recorded(RUN)
IN_USE = [f"data/{RUN}", CHECKPOINTS, RESULTS]
STAGES = str(dvc_stages.target(RUN))

# Once per command: not in its jobs' processes, not in what is called from here.
if RECORD and workflow.is_main_process and dvc_results.ASKED not in os.environ:
    try:
        dvc_results.refuse_beside_dvc()
        # Not beside another snakemake at work, nor before `--unlock`.
        free = not any(Path(".snakemake/locks").glob("*"))
        told = dvc_results.settle(RUN) if free else ""
    except (dvc_results.BusyError, dvc_results.DvcError) as error:
        raise WorkflowError(str(error)) from None
    if told:
        print(told, file=sys.stderr)


rule record:
    """Bring the profile's dvc.yaml up to date and have DVC cache what this workflow made, so that `dvc repro` has nothing to do."""
    input:
        REPORT.values(),
    output:
        touch(RECORDED),
    log:
        f"{LOGS}/record.log",
    conda:
        "../envs/ebjdat.yaml"
    params:
        profile=config["profile"],
        stages=STAGES,
        lock=dvc_results.lock_of(RUN),
        settled=dvc_results.settled(RUN),
        folders=IN_USE,
    shell:
        "(python workflow/scripts/dvc_stages.py --profile {params.profile} --inputs $EBJDAT_INPUTS"
        " && python workflow/scripts/dvc_results.py {params.folders}"
        " && dvc commit --force {params.stages} && cp {params.lock} {params.settled}) 2>&1 | tee -i {log}"
