-- Answers: when do the data of this MOUS become public?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: RELEASE_DATE  a date with time, or ISO 8601 text; UTC if it names no time zone
-- Rows:    none means that there is no date, and that the data are not public; of several the latest counts.
-- The date is read and never computed from the delivery: extensions exist.
SELECT DISTINCT
    delivery.RELEASE_DATE
FROM ALMA.BMMV_SCHEDBLOCK sched_block
JOIN ALMA.SHIFTLOG_ENTRIES shift ON shift.SE_SB_ID = sched_block.ARCHIVE_UID
JOIN ALMA.ASA_DELIVERY_ASDM_OUS delivered ON delivered.ASDM_UID = shift.SE_EB_UID
JOIN ALMA.ASA_DELIVERY_STATUS delivery ON delivery.DELIVERY_ID = delivered.DELIVERABLE_NAME
WHERE sched_block.MOUS_STATUS_UID = :mous_uid
