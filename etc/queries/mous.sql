-- Answers: to which project does this MOUS belong, and in which state is it?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: PROJECT_CODE         the project code, as 2017.1.01347.S
--          DOMAIN_ENTITY_STATE  the whole state, as Delivered or QA3InProgress/UserInitiated
-- Rows:    none means that there is no such MOUS; all rows must be equal.
-- The outer join keeps a MOUS whose project has no row: that is an error to look at, not an unknown MOUS.
SELECT DISTINCT
    project.PROJECT_CODE,
    ous.DOMAIN_ENTITY_STATE
FROM ALMA.OBS_UNIT_SET_STATUS ous
LEFT JOIN ALMA.ASA_PROJECT project ON project.PROJECT_UID = ous.OBS_PROJECT_ID
WHERE ous.STATUS_ENTITY_ID = :mous_uid
