-- Answers: to which MOUS does this execution block belong?
-- Bind:    :eb_uid, as uid://A002/Xcf92df/X3453
-- Columns: MOUS_STATUS_UID  as uid://A001/X12a3/X80e
-- Rows:    none means that the archive knows no such execution block.
SELECT DISTINCT
    sched_block.MOUS_STATUS_UID
FROM ALMA.BMMV_SCHEDBLOCK sched_block
JOIN ALMA.SHIFTLOG_ENTRIES shift ON shift.SE_SB_ID = sched_block.ARCHIVE_UID
JOIN ALMA.AQUA_EXECBLOCK execution_block ON execution_block.EXECBLOCKUID = shift.SE_EB_UID
WHERE execution_block.EXECBLOCKUID = :eb_uid
