-- Answers: where does this MOUS stand in its project?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: PROJECT_CODE        the project code, as 2017.1.01347.S
--          PROJECT_UID         the ObsProject entity, as uid://A001/X1221/Xdf8
--          PART_ID             the part of it that is this MOUS, as X659301709
--          PROJECT_STATUS_UID  the ProjectStatus entity
--          GOUS_UID            the group of the MOUS
--          SOUS_UID            the science unit above the group
-- Rows:    none means that there is no such MOUS; all rows must be equal.
SELECT DISTINCT
    project.PROJECT_CODE,
    unit.OBSUNITSETUID AS PROJECT_UID,
    unit.OBSUNITSETPARTID AS PART_ID,
    ous.OBS_PROJECT_STATUS_ID AS PROJECT_STATUS_UID,
    ous.PARENT_OBS_UNIT_SET_STATUS_ID AS GOUS_UID,
    gous.PARENT_OBS_UNIT_SET_STATUS_ID AS SOUS_UID
FROM ALMA.OBS_UNIT_SET_STATUS ous
LEFT JOIN ALMA.ASA_PROJECT project ON project.PROJECT_UID = ous.OBS_PROJECT_ID
LEFT JOIN ALMA.AQUA_OUS unit ON unit.OUS_STATUS_ENTITY_ID = ous.STATUS_ENTITY_ID
LEFT JOIN ALMA.OBS_UNIT_SET_STATUS gous ON gous.STATUS_ENTITY_ID = ous.PARENT_OBS_UNIT_SET_STATUS_ID
WHERE ous.STATUS_ENTITY_ID = :mous_uid
