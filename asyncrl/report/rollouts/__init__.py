"""What the model said: rollouts of some steps and of evaluations, in run.dir/rollouts; written beside, shown later.

    trainer (choice: which)  ─▶ desk ─▶ writer (a thread) ─▶ writer_process (text, files) ─▶ files ─▶ shown
    generators (evaluations) ─▶ desk ─┘

`records` has the schema of a line. Neither training nor the desk waits for any of this, and none of it can end a run.
"""
