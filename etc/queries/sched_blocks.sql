-- Answers: which scheduling blocks are under this MOUS, in which state, and which execution blocks have they?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: SCHEDBLOCK_UID  as uid://A001/X12a3/X804
--          STATUS_UID      its SchedBlockStatus entity, as uid://A001/X12a3/X80f
--          STATE           FullyObserved, Deleted, ...; NULL if its status is unknown
--          EXECBLOCKUID    an execution block of it; NULL if it has none
-- Rows:    one for each scheduling block and execution block.
SELECT DISTINCT
    sched_block.ARCHIVE_UID AS SCHEDBLOCK_UID,
    sched_block.SB_STATUS_UID AS STATUS_UID,
    status.DOMAIN_ENTITY_STATE AS STATE,
    execution_block.EXECBLOCKUID
FROM ALMA.BMMV_SCHEDBLOCK sched_block
LEFT JOIN ALMA.SCHED_BLOCK_STATUS status ON status.STATUS_ENTITY_ID = sched_block.SB_STATUS_UID
LEFT JOIN ALMA.AQUA_EXECBLOCK execution_block ON execution_block.SCHEDBLOCKUID = sched_block.ARCHIVE_UID
WHERE sched_block.MOUS_STATUS_UID = :mous_uid
