-- Answers: who may have the data of this MOUS before they are public?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: ROLE   PI or delegee; only shown to people
--          EMAIL  the address of the person, in any case
-- Rows:    one for each person.
-- Delegees stand in a table of our own (its columns are in etc/archive.sql); a site whose archive keeps them
-- elsewhere puts its own entitled.sql into the directory that [archive] queries names.
-- The outer joins keep a MOUS whose PI has no account: that is an error to look at, and refuses nobody.
SELECT
    'PI' AS ROLE,
    account.EMAIL
FROM ALMA.OBS_UNIT_SET_STATUS ous
LEFT JOIN ALMA.BMMV_OBSPROPOSAL proposal ON proposal.PROJECTUID = ous.OBS_PROJECT_ID
LEFT JOIN ALMA.ACCOUNT account ON account.ACCOUNT_ID = proposal.PI_USERID
WHERE ous.STATUS_ENTITY_ID = :mous_uid
UNION ALL
SELECT
    'delegee' AS ROLE,
    account.EMAIL
FROM ALMA.OBS_UNIT_SET_STATUS ous
JOIN ALMA.STAGECAL_DELEGEE delegee ON delegee.PROJECTUID = ous.OBS_PROJECT_ID
LEFT JOIN ALMA.ACCOUNT account ON account.ACCOUNT_ID = delegee.ACCOUNT_ID
WHERE ous.STATUS_ENTITY_ID = :mous_uid
