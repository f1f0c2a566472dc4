-- Answers: which execution blocks does this MOUS have, and what did the quality check at the telescope say?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: EXECBLOCKUID  as uid://A002/Xcf92df/X3453
--          QA0STATUS     Pass, SemiPass, Fail, Unset or Pending
-- Rows:    one for each execution block; the shift log has several entries for one, hence DISTINCT.
SELECT DISTINCT
    execution_block.EXECBLOCKUID,
    execution_block.QA0STATUS
FROM ALMA.BMMV_SCHEDBLOCK sched_block
JOIN ALMA.SHIFTLOG_ENTRIES shift ON shift.SE_SB_ID = sched_block.ARCHIVE_UID
JOIN ALMA.AQUA_EXECBLOCK execution_block ON execution_block.EXECBLOCKUID = shift.SE_EB_UID
WHERE sched_block.MOUS_STATUS_UID = :mous_uid
