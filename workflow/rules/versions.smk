# A profile's own results are versioned, where the checkout is a DVC repository and DVC itself is not the caller (it sets
# DVC_STAGE for its commands). Overridden runs are trials and are not.
VERSIONED = not OVERRIDES and Path(".dvc/config").exists() and Path(".git").exists()
RECORD = VERSIONED and "DVC_STAGE" not in os.environ
sys.path.append(f"{workflow.basedir}/workflow/scripts")
import at_work
import dvc_results
import dvc_stages

RECORDED = dvc_stages.recorded(RUN)
HELD = []


def begin():
    """Called when jobs begin: what they depend on is kept, and DVC's first stage waits for them."""
    HELD.append(at_work.hold())
    if VERSIONED and "DVC_STAGE" not in os.environ:
        dvc_stages.write_digests(dvc_stages.digests(RUN, PROFILE))
    if VERSIONED:
        made = [
            file
            for one in jobs.jobs(PROFILE)
            for file in jobs.outputs(LAYOUT, one).values()
        ]
        atexit.register(dvc_results.keep_stamps, RUN, made)


# Once per command: not in its jobs' processes, not in what is called from here.
if workflow.is_main_process and dvc_results.ASKED not in os.environ:
    if "DVC_STAGE" in os.environ:
        asked = os.environ.get("DVC_STAGE", "").split(":")[-1]
        if Path(LAYOUT.digest(asked)) in dvc_stages.changed(
            dvc_stages.digests(RUN, PROFILE)
        ):
            raise WorkflowError(
                "settings or code changed since `dvc repro` began; run it again"
            )
    elif RECORD:
        if busy := at_work.by_another("dvc"):
            raise WorkflowError(busy)
        try:
            # Not beside another snakemake at work.
            message = "" if at_work.by_another() else dvc_results.adopt_dvc_outputs(RUN)
        except dvc_results.DvcError as error:
            raise WorkflowError(str(error)) from None
        if message:
            print(message, file=sys.stderr)
