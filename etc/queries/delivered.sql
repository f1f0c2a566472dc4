-- Answers: which MOUSs are delivered, and since when are they as they are?
-- Bind:    :since, a time as 2024-05-01T00:00:00
-- Columns: STATUS_ENTITY_ID  as uid://A001/X12a3/X80e
--          UPDATED           a date with time, or the OUSStatus document, whose TimeOfUpdate is read then
-- Rows:    one for each MOUS; older ones than :since are left out afterwards. The documents of all MOUSs are many
--          megabytes: a site whose archive has a column with the time replaces this query and compares there.
SELECT
    ous.STATUS_ENTITY_ID,
    ous.XML AS UPDATED
FROM ALMA.OBS_UNIT_SET_STATUS ous
WHERE ous.DOMAIN_ENTITY_STATE IN ('Delivered')
    AND ous.XML IS NOT NULL
    AND :since IS NOT NULL
